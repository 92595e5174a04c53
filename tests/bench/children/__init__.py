"""The programs that are measured, or that measure, as processes of their own."""
