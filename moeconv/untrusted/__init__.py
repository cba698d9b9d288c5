"""Meeting what others wrote: files, JSON and text that may be damaged, huge, or made to do harm."""
