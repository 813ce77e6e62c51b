"""Launchers: how ranks are started, one module for each way."""
