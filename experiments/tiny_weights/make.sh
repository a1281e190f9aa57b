#!/usr/bin/env bash
# Trains everything under src/motionrag/weights/tiny from nothing, in order; `make weights` runs it. Logs: logs/*.csv.
set -euo pipefail
cd "$(dirname "$0")"
autoencoder() {
    python train_autoencoder.py
    python refine_decoder.py
    python ship.py networks vae
}
encoders() {
    python train_encoders.py motion
    python train_encoders.py appearance
    python ship.py networks videomae dinov2
    python cache.py text
}
# neither needs the other, and two trainings of a thread each do more than one of two
(export TRAIN_THREADS=1; autoencoder) &
first=$!
(export TRAIN_THREADS=1; encoders) &
wait $first
wait $!
python cache.py latents
python train_backbone.py
python ship.py networks transformer
python train_backbone.py --check
python train_backbone.py --finetune ../../src/motionrag/weights/tiny/finetuned.safetensors --lr 5e-4 --steps 800
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
