"""One HTML page about one run or several: what was lost, chosen and spent, from the run folders alone."""
