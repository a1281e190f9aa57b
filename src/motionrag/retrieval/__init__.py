"""The retrieval database: caption index, token store, retrievers."""
