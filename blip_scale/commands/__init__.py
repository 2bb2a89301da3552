"""Commands of the user: each module parses the command line and calls the rooms below it."""
