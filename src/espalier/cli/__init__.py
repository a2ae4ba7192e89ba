"""The command line: thin sugar over the API."""
