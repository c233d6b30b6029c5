"""Trilevel inside other libraries; each module needs its library installed, and none is imported by the rest."""
