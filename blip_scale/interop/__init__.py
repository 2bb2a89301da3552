def load_bert(*a): pass
def load_vision(*a): pass
