"""Tables and pictures of data sets and runs, from their own files."""
