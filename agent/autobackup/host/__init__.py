"""This machine: libvirt, inotify, files, disks. The only room that imports libvirt."""
