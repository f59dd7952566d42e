"""The maths of RLHF: tensors in, tensors out, options by keyword.
Pure: Python and torch, nothing of Ray, DeepSpeed or Hugging Face.

May import: nothing of the package.
"""
