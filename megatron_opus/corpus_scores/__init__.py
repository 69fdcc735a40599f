"""Static selection: every candidate document of a prepared corpus gets one number, and a part of them is kept."""
