"""Module formats of compressed experts: what `FORMATS` names is imported when it is needed."""
