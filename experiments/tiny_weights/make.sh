#!/usr/bin/env bash
# Trains everything under src/motionrag/weights/tiny from nothing, in order; `make weights` runs it. Logs: logs/*.csv.
set -euo pipefail
cd "$(dirname "$0")"
python train_autoencoder.py
python refine_decoder.py
python ship.py networks vae
python cache.py text
python cache.py latents
python train_backbone.py
python train_backbone.py --go-on --steps 4500 --lr 1.2e-3 --seed 1 --log backbone_2
python train_encoders.py motion
python train_encoders.py appearance
python ship.py networks transformer videomae dinov2
cd ../..
runs=outputs/tiny_weights
# two processes of 16 clips, a thread each
OMP_NUM_THREADS=1 motionrag train experiment=tiny_adapter trainer=ddp_cpu trainer.devices=2 logger=csv hydra.run.dir=$runs/adapter
adapter=$runs/adapter/weights/adapter.safetensors
motionrag train experiment=tiny_cama logger=csv hydra.run.dir=$runs/cama resampler_weights=$adapter
python experiments/tiny_weights/ship.py stages $adapter $runs/cama/weights/cama.safetensors
for stage in adapter cama; do
    cp "$(ls $runs/$stage/csv/version_*/metrics.csv | tail -n 1)" experiments/tiny_weights/logs/$stage.csv
done
python experiments/tiny_weights/train_backbone.py --check
