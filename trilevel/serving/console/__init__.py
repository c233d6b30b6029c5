"""The web page of `trilevel serve`."""
