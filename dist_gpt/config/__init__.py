"""The typed configuration: `schema` defines the keys, `load` reads files and finds every problem."""
