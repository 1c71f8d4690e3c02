"""One folder per data set, each with a prepare.py; common.py is what they share."""
