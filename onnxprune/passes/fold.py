def fold(model): return model.proto, []
