"""One small reader per data set; `readers` names them all."""
