"""`fastattn bench`: the kernels against torch's own attention and against the machine's measured peak."""
