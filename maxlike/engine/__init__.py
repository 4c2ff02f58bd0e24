"""From prompts to tokens: sampling, compiled steps, and the loop around them.

`maxlike.LLM` and `maxlike.AsyncEngine` are what most programs need; `maxlike.engine.engine.Engine` is the loop in
them, `maxlike.engine.config.EngineConfig` says how large it is, `maxlike.engine.sampling_params.SamplingParams` what a
request asks for, and `maxlike.engine.output` what comes back.
"""
