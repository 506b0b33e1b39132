"""Asking models: from the command line, a page or another program. What is here loads with the command line."""
