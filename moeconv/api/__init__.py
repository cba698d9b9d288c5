"""The public functions, a module a command; `moeconv` itself offers them (`moeconv.convert`)."""
