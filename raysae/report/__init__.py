"""A run folder as one page that opens offline: the answer first, then what it stands on."""
