"""The buffers, by the modules that they are in from DeepEP's second version on."""
