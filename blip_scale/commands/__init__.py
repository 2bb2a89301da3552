"""Command-line programs. Each module parses its arguments and calls the packages that do the work.
"""
