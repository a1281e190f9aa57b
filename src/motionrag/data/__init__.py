"""Clips on disk: video files, shards, batches, and the MotionWorld renderer."""
