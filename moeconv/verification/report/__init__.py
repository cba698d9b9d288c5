"""The report: verify.json, verify.md and the plots."""
