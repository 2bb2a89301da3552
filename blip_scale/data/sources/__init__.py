"""One small reader per data set; `readers` lists them all."""
