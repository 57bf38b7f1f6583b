"""The remote backend's place in the client; see `art.serverless.backend`."""
