"""A training server of one's own: what is loaded at the import of its plugin knows neither database nor HTTP."""
