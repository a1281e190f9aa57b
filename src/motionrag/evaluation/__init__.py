"""What ``motionrag evaluate`` is made of: test clips, conditions, scores, tables, and the clips that are kept."""
