"""`python -m moeconv_train`: see launch.py."""

from moeconv_train.launch import main

main()
