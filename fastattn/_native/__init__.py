"""Where setup.py and `make native` put the native libraries."""
