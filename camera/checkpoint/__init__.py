"""Checkpoints on disk: shards, module formats, configuration, native export."""
