"""What moeconv adds around an unmodified MaxText: configs, data, a launcher, a sidecar."""
