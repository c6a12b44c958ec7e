import torch
from transformers import Trainer, TrainingArguments

from modeling_uhop import SeparationCallback, STanHopConfig, STanHopForPrediction


torch.manual_seed(0)
hours = torch.arange(600.0)
series = 12 + 5 * torch.sin(2 * torch.pi * hours / 24) + 0.5 * torch.randn(600)  # degrees
windows = series.unfold(0, 96 + 24, 1).unsqueeze(-1)  # windows of 96 hours, and the 24 hours after each

config = STanHopConfig(
    num_input_channels=1, context_length=96, prediction_length=24, d_model=16, ffn_dim=32, memory_type="tune", use_linear_skip=True
)
model = STanHopForPrediction(config)
model.store(windows[:150, :96], windows[:150, 96:])
examples = [{"past_values": window[:96], "future_values": window[96:]} for window in windows[175:340]]
arguments = TrainingArguments(
    "out", max_steps=40, learning_rate=6e-3, report_to="none", save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False
)
Trainer(model, arguments, train_dataset=examples, callbacks=[SeparationCallback(steps=5, batch_size=16)]).train()

past, future = windows[360:, :96], windows[360:, 96:]
forecast = model.eval().generate(past).sequences[:, 0]
print(f"mean absolute error: STanHop {(forecast - future).abs().mean():.2f} degrees")
print(f"repeat the last 24 hours: {(past[:, -24:] - future).abs().mean():.2f} degrees")
