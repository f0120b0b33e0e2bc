"""The labs, one file each: a module here defines `LAB`."""
