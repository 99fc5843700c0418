"""The command line: it parses, calls the library function of the same name, and prints."""
