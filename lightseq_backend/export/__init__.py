"""Models of other libraries, made into model directories of this server: one module a source."""
