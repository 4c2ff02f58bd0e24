"""An OpenAI-compatible HTTP server in front of a `maxlike.AsyncEngine`.

`maxlike serve` is the way in. `maxlike.serve.config.ServeConfig` has its options, `maxlike.serve.app.make_app` the
application, for programs that run it themselves, and `maxlike.serve.protocol` the bodies of requests and replies.
"""
