"""The files of a run: folders, names, identity, failures."""
