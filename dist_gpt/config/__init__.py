"""The typed configuration: `schema` says what may be written, `load` reads it and finds every problem."""
