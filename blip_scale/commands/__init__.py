"""Command-line programs. Each module parses arguments and calls the packages that do the work."""
