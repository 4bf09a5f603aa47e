"""Numbers that others published, each table a file that says where it is from."""
