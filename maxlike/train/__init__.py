"""Training: the data, the objective, the steps, and what is kept of them.

`maxlike.train.loop.train` does what `maxlike train` does, from a `maxlike.train.config.TrainConfig`, and
`maxlike.train.export.export` what `maxlike export` does. For a loop of one's own:

- `maxlike.train.data.load_dataset` reads JSONL and packs it into batches, `maxlike.train.batch.Batch`;
- `maxlike.train.optimizer.make_optimizer` and `maxlike.train.step.init_state` make what a step needs beside a model,
  `maxlike.train.step.make_train_step` the step itself;
- `maxlike.train.objective` and `maxlike.train.loss` say what is minimised;
- `maxlike.train.checkpoint.Checkpoints` keeps what a run needs to go on.
"""
