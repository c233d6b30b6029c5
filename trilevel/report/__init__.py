"""Reports: the machine block, HTML pages, plots."""
