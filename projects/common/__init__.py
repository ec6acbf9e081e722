"""What the worlds of projects/ share: places in scenes, words, COCO folders and the detector."""
