"""What samples are compared with, in every published form."""
