"""The user's commands: each module reads the command line and calls the rooms below it."""
