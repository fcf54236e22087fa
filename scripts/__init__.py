"""Commands, each with --help.

report            measured results next to the published ones
attentions        what the attentions of a trained model do
bench             benchmarks, and the prices by which implementations are chosen
data              makes data sets
gpu               everything that needs a GPU, as one run
profile_model     parameters and multiply-adds by layer, and which layers share which warehouse
draw_detections   a detector's results on images
kill_storm        proves that a run survives SIGKILL
check_wheel       tests the library's wheel in empty environments
"""
