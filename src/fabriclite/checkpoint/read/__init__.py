"""Any path, opened: what it holds, without its data; and reading that, in parts."""
