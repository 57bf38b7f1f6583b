"""An inference engine and a training engine without a model: real processes on the real surfaces, in milliseconds.

An adapter's "logprob" is a function of its weights, so a wrong adapter answers wrongly and the canary finds it. Tests
misuse it on purpose through a file of orders, named in the environment variable ART_FAKE_ORDERS.
"""
